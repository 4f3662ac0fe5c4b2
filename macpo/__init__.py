"""MACPO: weak-to-strong alignment by multi-agent contrastive preference optimisation.

The method is arXiv 2410.07672 (Lyu et al., ICLR 2025). Three packages, each usable alone:
`macpo.kernels` (operators), `macpo.engine` (training, generation, scoring), `macpo` (the method).
"""

__version__ = "0.1.0"
