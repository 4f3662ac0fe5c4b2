"""docs/compatibility.md says what running each family finds, and nothing in it is silently wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from bench.compatibility import page
from bench.compatibility.families import FAMILIES, Family, config_of, model_of
from bench.compatibility.measure import measure
from macpo.engine.errors import ConfigError
from macpo.engine.models import support
from macpo.engine.models.loading import quiet_transformers
from macpo.engine.models.policy import PolicyModule

VERSION, LINES = page.committed()
LATE = {"gemma2", "gpt_oss", "vaultgemma", "phimoe (short window)"}
"""Refused by the attention hook or the probe, whose reasons no configuration tells."""


def test_every_family_has_a_row() -> None:
    assert len(LINES) >= 80 and set(LINES) <= {family.name for family in FAMILIES}
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert sum("| yes | yes | yes | yes |" in line for line in LINES.values()) >= 50


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_row_is_what_running_the_family_finds(family: Family, tmp_path: Path) -> None:
    if not family.installed:
        pytest.skip(f"transformers {transformers.__version__} has no {family.model_type}")
    row = measure(family, tmp_path)
    wrong = [result for result in row.results if result != "yes" and not result.startswith("refused")]
    assert not wrong and (row.early or family.name in LATE)
    if transformers.__version__ == VERSION:
        assert page.line(row) == LINES[family.name]


@pytest.mark.parametrize("model_type", support._KNOWN)
def test_what_is_refused_by_its_name_is_what_the_probe_refuses(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(next(family for family in FAMILIES if family.model_type == model_type))
    with pytest.raises(ConfigError, match=support._KNOWN[model_type]):
        support.refuse_unsupported(config)
    monkeypatch.setattr(support, "_KNOWN", {})
    with quiet_transformers(), pytest.raises(ConfigError):
        PolicyModule(model_of(config))
