"""docs/compatibility.md says what running each family finds, and nothing in it is silently wrong.

`python -m bench.compatibility --check` runs all families; here are those that the configuration refuses, which cost
nothing, and of the others one of each kind of attention, head and layer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from bench.compatibility import page
from bench.compatibility.families import FAMILIES, Family, config_of, model_of
from bench.compatibility.measure import COLUMNS, measure
from macpo.engine.errors import ConfigError
from macpo.engine.models import support
from macpo.engine.models.loading import quiet_transformers
from macpo.engine.models.policy import PolicyModule

PAGE = page.committed()
BY_NAME = {family.name: family for family in FAMILIES}
SAME = transformers.__version__ == PAGE.version
RUN = [
    "llama", "cohere2", "deepseek_v3", "gemma3 (with its vision part)", "gemma3n_text (shared keys)", "gemma4_text",
    "gpt2", "mixtral", "olmo3", "phimoe (short window)",
]  # fmt: skip
WORKS = " | yes" * len(COLUMNS) + " |"


def early(family: Family) -> bool:
    """Whether the configuration is enough to refuse it."""
    try:
        support.refuse_unsupported(config_of(family))
    except ConfigError:
        return True
    return False


def test_every_family_has_a_row() -> None:
    assert len(BY_NAME) == len(FAMILIES) and set(PAGE.families) <= set(BY_NAME)
    assert not SAME or set(PAGE.families) == {family.name for family in FAMILIES if family.installed}
    lines = [*PAGE.families.values(), *PAGE.real.values()]
    assert sum(WORKS in line for line in lines) >= 60
    assert all(
        cell in ("", "yes") or cell.startswith("refused: ") for line in lines for cell in line.split(" | ")[2:-1]
    )


@pytest.mark.parametrize("name", [name for name in BY_NAME if name in RUN or "refused" in PAGE.families.get(name, "")])
def test_the_row_is_what_running_the_family_finds(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    if not family.installed:
        pytest.skip(f"transformers {transformers.__version__} has no {family.model_type}")
    if name not in RUN and not early(family):
        pytest.skip("python -m bench.compatibility --check runs it")
    row = measure(family, tmp_path)
    assert all(result == "yes" or result.startswith("refused") for result in row.results)
    assert not SAME or page.line(row) == PAGE.families[name]


@pytest.mark.parametrize("model_type", support._KNOWN)
def test_what_is_refused_by_its_name_is_what_the_probe_refuses(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(next(family for family in FAMILIES if family.model_type == model_type))
    with pytest.raises(ConfigError, match=support._KNOWN[model_type]):
        support.refuse_unsupported(config)
    monkeypatch.setattr(support, "_KNOWN", {"bloom": ""})
    with quiet_transformers(), pytest.raises(ConfigError):
        PolicyModule(model_of(config))
