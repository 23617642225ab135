"""Cards: what the Hub takes, refuses and shows, through the client's own ways to it."""

from __future__ import annotations

import json

import pytest

from local_hub import ClientError
from local_hub.cards import judge, tags_of

GOOD = """
language: [en, de]
license: apache-2.0
library_name: transformers
pipeline_tag: text-classification
base_model: org/base
base_model_relation: finetune
datasets: [glue, org/data]
tags: [pruned, 'yes']
model-index:
- name: pruned
  results:
  - task: {type: text-classification}
    dataset: {type: glue, name: GLUE}
    metrics: [{type: accuracy, value: 0.9}]
"""
BAD = {
    "license: apache": '"license" must be one of [',
    "license: [mit, nonsense]": '"license[1]" must be one of',
    "base_model: ./output/checkpoint-3": '"base_model" with value "./output/checkpoint-3" is not valid',
    "base_model: /home/models/base": "is not valid",
    "base_model: [org/base, a/b/c]": '"base_model[1]" with value "a/b/c"',
    "base_model: 3": '"base_model" must be a string',
    "base_model_relation: pruned": '"base_model_relation" must be one of [adapter, finetune, merge, quantized]',
    "tags: pruned": '"tags" must be an array',
    "tags: [1]": '"tags[0]" must be a string',
    "tags: [yes]": '"tags[0]" must be a string',
    "language: no": '"language" must be a string',
    "language: english": "must be an ISO 639-1",
    "datasets: ['../data']": '"datasets[0]" with value "../data" is not valid',
    "datasets: [/data/train.csv]": "is not valid",
    "pipeline_tag: text-pruning": '"pipeline_tag" must be one of',
    "library_name: [transformers]": '"library_name" must be a string',
    "metrics: [{type: accuracy}]": '"metrics[0]" must be a string',
    "license: mit\nlicense: mit": "duplicated mapping key 'license'",
    "a: {b: 1, b: 2}": "duplicated mapping key 'b'",
    "a: b: c": "Invalid YAML",
    "a: [b": "Invalid YAML",
    "- a\n- b": "must be a mapping",
    "model-index: {name: x}": '"model-index" must be an array',
    "model-index: [{results: []}]": '"model-index[0].name" is required',
    "model-index: [{name: x}]": '"model-index[0].results" must be an array',
    "model-index: [{name: x, results: [{}]}]": '"model-index[0].results[0].task.type" is required',
    "model-index: [{name: x, results: [{task: "
    "{type: a}, dataset: {type: b}, metrics: [{type: c, value: 1}]}]}]": "dataset.name",
    "model-index: [{name: x, results: [{task: "
    "{type: a}, dataset: {type: b, name: c}, metrics: [{type: d}]}]}]": "metrics[0].value",
    "model-index: [{name: x, results: [{task: "
    "{type: a}, dataset: {type: b, name: c}, metrics: []}]}]": "at least one item",
}


def card(metadata: str) -> str:
    return f"---\n{metadata.strip()}\n---\n# A model\n"


@pytest.fixture(scope="module")
def owner(hub_client):
    client = hub_client("hf_owner")
    client.run(
        "from huggingface_hub import HfApi, ModelCard, ModelCardData, RepoCard; api = HfApi(); "
        "api.create_repo('owner/carded')"
    )
    return client


def test_a_good_card_is_taken_and_shown(hub, owner):
    owner.run("card = ModelCard(text); card.validate(); card.push_to_hub('owner/carded')", text=card(GOOD))
    assert judge(hub.files("owner/carded")["README.md"].decode()) == judge(card(GOOD))
    shown = owner.run("""
        info = api.model_info('owner/carded')
        base = ModelCard.load('owner/carded').data.base_model
        result = info.pipeline_tag, info.library_name, info.card_data.license, info.tags, base
        """)
    tags = "transformers text-classification pruned yes en de dataset:glue dataset:org/data base_model:org/base"
    tags += " base_model:finetune:org/base license:apache-2.0"
    assert shown == ["text-classification", "transformers", "apache-2.0", tags.split(), "org/base"]
    assert owner.run("result = api.model_info('owner/carded').model_index")[0]["name"] == "pruned"


@pytest.mark.parametrize("metadata", BAD)
def test_a_bad_card_is_refused_with_the_reason(metadata):
    verdict = judge(card(metadata))
    assert any(BAD[metadata] in each for each in verdict.errors), verdict.errors


def test_a_bad_card_does_not_get_in(hub, owner):
    head = hub.head("owner/carded")
    text = card("license: apache")
    for code in (
        "RepoCard(text).validate()",
        "ModelCard(text).push_to_hub('owner/carded')",
        "api.upload_file(path_or_fileobj=text.encode(), path_in_repo='README.md', repo_id='owner/carded')",
    ):
        with pytest.raises(ClientError, match='"license" must be one of') as caught:
            owner.run(code, text=text)
        assert caught.value.type == "ValueError"
    body = [
        {"key": "header", "value": {"summary": "past the check"}},
        {"key": "file", "value": {"path": "README.md", "content": text}},
    ]
    raw = "\n".join(map(json.dumps, body)).encode()
    status, headers, _ = hub.ask("POST", "/api/models/owner/carded/commit/main", raw, token="hf_owner")
    assert status == 400 and "Invalid metadata in README.md" in headers["x-error-message"]
    assert hub.head("owner/carded") == head


def test_a_card_without_metadata_is_doubtful_but_taken(owner):
    heard = owner.run("""
        import warnings
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            api.upload_file(path_or_fileobj=b'# Nothing', path_in_repo='README.md', repo_id='owner/carded')
        result = [str(each.message) for each in heard]
        """)
    assert any("empty or missing yaml metadata" in each for each in heard)


@pytest.mark.parametrize("text", ["# no block", "---\n---\n", "", "---\nunfinished: 1\n"])
def test_no_metadata_is_no_error(text):
    verdict = judge(text)
    assert (verdict.errors, bool(verdict.warnings), tags_of(verdict.metadata)) == ([], True, [])
