"""Where the HH-RLHF files lie: beside the checkout or in it, as shared/data/hh-rlhf. Standard library only."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = tuple(folder / "shared" / "data" / "hh-rlhf" for folder in (ROOT.parent, ROOT))
HH = next((place for place in PLACES if place.exists()), PLACES[0])
GENERATED = "generated"


def source_of(given: str | None) -> Path | None:
    """Return the folder of the pairs: `given`, without it HH where it is; None means generated pairs."""
    if given == GENERATED:
        return None
    if given:
        return Path(given)
    return HH if HH.exists() else None
