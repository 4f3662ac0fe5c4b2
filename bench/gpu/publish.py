"""Turns an archive of the suite into bench/results/<device>: one small file a part, without logs."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from bench.gpu.parts import Part
from bench.gpu.store import DONE, Store, write_json


def publish(archive: Path, parts: list[Part], results: Path) -> list[Path]:
    """Write the result files of all parts of `archive`; return their paths.

    Of a part that ran out of time the cases count that it had finished; its file names the others.

    Raises:
        ValueError: the archive is of small sizes, or its tests have not all passed: figures without them do not count.
    """
    from bench.harness.device import slug_of  # imports torch, which the suite itself does without

    written = []
    with TemporaryDirectory(prefix="macpo-publish-") as name:
        store = Store(Path(name), Path(name) / "work", archive)
        tests = store.outcome("tests")
        if tests is None or tests.small or tests.status != DONE:
            why = "not at real sizes" if tests and tests.small else f"tests: {tests.status if tests else 'not run'}"
            raise ValueError(f"{archive}: {why}")
        for part in parts:
            for body in store.results(part.name):
                path = results / slug_of(body["device"]) / f"{part.result}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, body)
                written.append(path)
    return written
