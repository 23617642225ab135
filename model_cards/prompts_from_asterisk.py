"""Recordings and transcripts of Debian's Asterisk prompts as data for recipes/speech_recognition.py.

    apt-get install asterisk-core-sounds-en-wav
    python model_cards/prompts_from_asterisk.py OUTPUT

One speaker, some 500 short prompts of a telephone exchange at 8 kHz (Allison Smith, CC-BY-SA-3.0: see
/usr/share/doc/asterisk-core-sounds-en/copyright). OUTPUT gets train.csv, validation.csv, test.csv (audio, text) and the
sound files. Left out are prompts whose transcripts hold brackets or notes, or no letter, and those that say one letter
of the alphabet alone. Prompts with the same words are in the same split; of each ten different texts, in the order of a
hash of their words, two are validation and three are test data.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import re
import shutil
import sys
from pathlib import Path

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
SPLITS = {"test": (0, 1, 2), "validation": (3, 4), "train": (5, 6, 7, 8, 9)}  # by the place of a text among ten


def transcripts(text: str) -> dict[str, str]:
    """The prompts by name, without those that say nothing, or whose transcripts say more than is heard."""
    found = {}
    for line in text.splitlines():
        name, sign, words = line.partition(":")
        words = " ".join(words.replace("...", " ").split())
        said = sign and not line.startswith(";") and re.search(r"[A-Za-z]{2}", words)
        if said and not re.search(r"[\[\](){}<>*#:]", words):
            found[name.strip()] = words
    return found


def words_of(text: str) -> str:
    """A text without case and punctuation: what two prompts have in common that say the same."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def split(found: dict[str, str]) -> dict[str, list[str]]:
    """The names of the prompts in each split; the same words are never in two of them."""
    said = sorted(
        {words_of(text) for text in found.values()}, key=lambda words: hashlib.sha256(words.encode()).digest()
    )
    place = {words: index % 10 for index, words in enumerate(said)}
    names = {use: [] for use in SPLITS}
    for name, text in sorted(found.items()):
        use = next(use for use, places in SPLITS.items() if place[words_of(text)] in places)
        names[use].append(name)
    return names


def main() -> None:
    """Write the splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the data")
    parser.add_argument("--sounds", type=Path, default=SOUNDS, help="folder of the sound files")
    parser.add_argument("--transcripts", type=Path, default=TRANSCRIPTS, help="their texts")
    args = parser.parse_args()
    with gzip.open(args.transcripts, "rt", encoding="utf-8") as file:
        found = transcripts(file.read())
    found = {name: text for name, text in found.items() if (args.sounds / f"{name}.wav").is_file()}
    for use, names in split(found).items():
        rows = []
        for name in names:
            place = Path("sounds", f"{name}.wav")
            (args.output / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(args.sounds / f"{name}.wav", args.output / place)
            rows.append([str(place), found[name]])
        with (args.output / f"{use}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["audio", "text"], *rows])
        sys.stdout.write(f"{use}: {len(rows):,} prompts\n")


if __name__ == "__main__":
    main()
