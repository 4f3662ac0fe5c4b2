"""The whole method on a small demo world: every agent's gold score by iteration, and what the student now writes.

python examples/demo_run.py
"""

from pathlib import Path

import macpo


def main() -> None:
    run = macpo.run(Path(__file__).with_name("small-demo.yaml"))  # resumes, or returns at once where it is done
    scores = run.scores()
    print(scores.pivot_table(index=["role", "agent"], columns="iteration", values="gold", sort=False).round(3))

    prompt = "my name is emma and i want to repair the car ."
    for iteration in (0, 1):
        student = run.policy("student", iteration)
        (output,) = student.generate(prompt, seed=1)
        print(f"{student.name}: {output.text}")
    print(f"report: {run.report}")


if __name__ == "__main__":
    main()
