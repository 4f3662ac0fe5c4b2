"""The parts of `python -m bench.gpu_suite`: what each runs, under which limit, and how results survive a kill."""
