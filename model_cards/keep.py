r"""Keep the card of a recipe's model here, with what it is made from; or make all that are kept anew from that, after a
change of the card:

    python model_cards/keep.py runs/minilm/iteration-2 minilm-emotion \
        --finetuned_from sentence-transformers/all-MiniLM-L6-v2
    python model_cards/keep.py --again
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from deeparc_hf import create_model_card
from deeparc_hf.publish.encoders import their_page
from deeparc_hf.publish.gather import EVALUATIONS_FILE, content_of_folder

ALWAYS = (
    *("config.json", "preprocessor_config.json", "tokenizer_config.json"),
    *("modules.json", "config_sentence_transformers.json"),  # of a sentence encoder
)
BESIDE = ("results.md", "scores.md")  # of the experiment, in the folder above


def keep(model: Path, target: Path, *, answers: bool = True, **told: str | None) -> None:
    """Copy the reports that are of these very weights, and make the card anew from these. The folder is there whole or
    not at all. Without `answers` the prompts and what models said to them stay out.
    """
    reports = content_of_folder(model).reports
    if target.exists():
        raise FileExistsError(f"{target} is there already. Delete it, or give another name.")
    known = json.loads((model / "card.json").read_text("utf-8")) if (model / "card.json").is_file() else {}
    known |= {key: value for key, value in told.items() if value is not None}
    known["repo_id"] = f"org/{target.name}"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, target.name)
        folder.mkdir()
        for file in [*(model / name for name in (*ALWAYS, *reports)), *(model.parent / name for name in BESIDE)]:
            if file.is_file() and file.name not in (
                "pruning_report.md",
                "report.md",
                "sparsity_report.md",
            ):  # the card tells the same
                shutil.copy(file, folder)
        if not answers:
            leave_out_answers(folder)
        (folder / "card.json").write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        put_their_page(model, folder)
        create_model_card(folder, **known)
        shutil.copytree(folder, target)


def leave_out_answers(folder: Path) -> None:
    """Take the prompts, which may be sentences of somebody's data, and the answers out of the reports."""
    evaluations = folder / EVALUATIONS_FILE
    if evaluations.is_file():
        known = json.loads(evaluations.read_text("utf-8"))
        evaluations.write_text(json.dumps({**known, "answers": []}, indent=1) + "\n", "utf-8")
    results = folder / "results.md"
    if results.is_file():
        before, _, rest = results.read_text("utf-8").partition("## Answers\n")
        results.write_text(before + "".join(rest.partition("## Made with\n")[1:]), "utf-8")


def put_their_page(source: Path, target: Path) -> None:
    """Put the card of sentence-transformers, to which ours is added, where the card is made; else none."""
    card = source / "README.md"
    theirs = their_page(card.read_text("utf-8")) if card.is_file() else None
    (target / "README.md").unlink(missing_ok=True)
    if theirs is not None:
        (target / "README.md").write_text(theirs, "utf-8")


def make_again(folder: Path) -> None:
    """Make a kept card and its pictures anew from what lies beside it."""
    put_their_page(folder, folder)
    for old in folder.glob("*.png"):
        old.unlink()
    create_model_card(folder, **json.loads((folder / "card.json").read_text("utf-8")))


def main() -> None:
    """Keep one, or make all anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of the model, as a recipe leaves it")
    parser.add_argument("name", nargs="?", help="folder to make beside this file")
    parser.add_argument("--again", action="store_true", help="make all that are kept anew")
    parser.add_argument("--finetuned_from", help="Hub id of the base model, where a local folder stood for it")
    parser.add_argument("--without_answers", action="store_true", help="leave prompts and answers out")
    parser.add_argument("--dataset_tags", help="Hub id of the data, where local files stood for it")
    args = parser.parse_args()
    if args.again:
        for known in sorted(Path(__file__).parent.glob("*/card.json")):
            make_again(known.parent)
        return
    if args.model is None or args.name is None:
        parser.error("give the folder of the model and the name to keep it under, or --again")
    keep(
        args.model,
        Path(__file__).parent / args.name,
        answers=not args.without_answers,
        finetuned_from=args.finetuned_from,
        dataset_tags=args.dataset_tags,
    )


if __name__ == "__main__":
    main()
