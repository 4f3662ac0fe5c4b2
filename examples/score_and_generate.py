"""Generation and scoring alone, with any causal LM: several responses to each prompt, the likeliest first.

python examples/score_and_generate.py          # with the small demo's student; runs that demo where it is not done
python examples/score_and_generate.py SOURCE   # with a run, a model or adapter folder, or a Hub id
"""

import sys
from pathlib import Path

import macpo

PROMPTS = [
    "my name is emma and i want to repair the car .",
    [{"role": "user", "content": "hello , this is rosa . how do i paint the kitchen ?"}],  # a dialogue works as well
]


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else macpo.run(Path(__file__).with_name("small-demo.yaml")).folder
    policy = macpo.load_policy(source)
    for prompt, output in zip(PROMPTS, policy.generate(PROMPTS, n=4, max_new_tokens=32, seed=1), strict=True):
        texts = [sample.text for sample in output.samples]
        scores = policy.score([(prompt, text) for text in texts])  # the prompt is computed once for the four
        for score, text in sorted(zip((each.perplexity for each in scores), texts, strict=True)):
            print(f"perplexity {score:7.2f}  {text}")
        print()


if __name__ == "__main__":
    main()
