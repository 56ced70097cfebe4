"""What a model will reach, from a file of smaller runs.

Paper:    Choshen, Zhang and Andreas 2024, arXiv:2410.11840
Command:  ./run.sh python -m experiments.scaling --config.data=runs.csv
          --config.runs='out/*/result.json' for this project's own runs,
          --mode=plan --config.target_params=1e9 before anything is trained
Hardware: one CPU core
Time:     half a minute
Expected: within 1.1 % (median) of the largest of 41 published families
"""

from efficient_llm.scaling.config import ScalingConfig


def get_config() -> ScalingConfig:
  """All of the defaults; a file or a pattern of runs is still to be named."""
  return ScalingConfig()
