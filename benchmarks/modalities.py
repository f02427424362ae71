"""Twelve imaging modalities, by the words that banks, benchmarks and classifiers have for them.

    modality("Chest radiograph, PA view")  ->  "x-ray"

Where we depart from the paper, or it is silent: it counts twelve modalities and names three (1).
"""

import re
import unicodedata

# ours: the paper names radiology, pathology, optical coherence tomography. Name -> its words.
# The first table goes first: "CT angiography" is angiography.
MODALITIES = {
    "angiography": r"\w*angiogra\w*|venogra\w*|dsa",
    "nuclear medicine": r"nuclear|pet|spect|\w*scintigra\w*|bone scan|radionuclide",
    "ophthalmic imaging": r"\w*fund(?:us|oscop\w*)|octa?|optical coherence\b.*|slit lamp|retina\w*"
                          r"|ophthalm\w*",
    "endoscopy": r"\w*(?:endo|colono|broncho|laryngo|gastro|oto|laparo|cysto|colpo|arthro)scop\w*",
    "histopathology": r"histo\w*|patholog\w*|biops\w*|h ?&? ?e|immuno(?:histo|fluoresc)\w*",
    "electrical recording": r"e[ck]g|electro(?:cardio|encephalo|myo)\w*|eeg|emg|ctg"
                            r"|cardiotocogra\w*",
}, {
    "x-ray": r"x ?rays?|radiogra\w*|plain films?|mammogra\w*|fluoroscop\w*|barium|opg",
    "ct": r"cts?|cat scans?|computed tomogra\w*|computeri[sz]ed tomogra\w*|cbct|hrct",
    "mri": r"f?mri?s?|mrcp|magnetic resonance\b.*",
    "ultrasound": r"\w*ultraso\w*|sonogra\w*|doppler|echo\w*|us",
    "microscopy": r"\w*microscop\w*|\w*micrograph\w*|smears?|cytolog\w*|gram stain|bone marrow",
    "clinical photograph": r"photo(?:graph\w*|s)?|clinical images?|skin|dermatolog\w*|dermoscop\w*"
                           r"|gross\w*",
}  # fmt: skip


def modality(told: str) -> str:
    """The kind of image that a text names, one of MODALITIES; "other" if it names none, or two that
    are equally general."""
    words = " ".join(re.findall(r"[\w&]+", unicodedata.normalize("NFKC", told).casefold()))
    for table in MODALITIES:
        found = [name for name, known in table.items() if re.search(rf"\b(?:{known})(?!\w)", words)]
        if found:
            return found[0] if len(found) == 1 else "other"
    return "other"
