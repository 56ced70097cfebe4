"""Package metadata. The versions that are tested are in requirements.lock."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(
  r"__version__ = '(.+)'",
  (_ROOT / 'efficient_llm' / '__init__.py').read_text(encoding='utf-8'),
)
if _VERSION is None:
  raise ValueError("efficient_llm/__init__.py must hold __version__ = '...'.")

_CORE = [
  'absl-py>=2.3,<3',
  'array_record>=0.8,<0.9',
  'beartype>=0.22,<0.24',
  'flax>=0.12.6,<0.13',
  'grain>=0.2.16,<0.3',
  'jax>=0.10.2,<0.13',
  'jaxtyping>=0.3.7,<0.4',
  'matplotlib>=3.10,<4',
  'numpy>=2.0,<3',
  'optax>=0.2.8,<0.3',
  'orbax-checkpoint>=0.12,<0.13',
  'pyarrow>=21,<27',
  'rich>=14,<16',
  'scipy>=1.15,<2',
  'sentencepiece>=0.2.1,<0.3',
  'tensorboardX>=2.6.4,<3',
  'tensorstore>=0.1.78,<0.2',
  'tokenizers>=0.22,<0.24',
]

_EXTRAS = {
  'tpu': ['jax[tpu]>=0.10.2,<0.13'],
  'gpu': ['jax[cuda13]>=0.10.2,<0.13'],
  'hf': [
    'huggingface_hub>=1.0,<3',
    'safetensors>=0.6,<0.9',
    'transformers>=5.0,<6',
  ],
  'lm_eval': ['lm-eval>=0.4.9,<0.5'],
  'rl': ['math-verify>=0.8,<0.10', 'reasoning-gym>=0.1.24,<0.2'],
  'vision': ['pillow>=11,<14', 'scikit-learn>=1.5,<2'],
  'wan': [
    'cryptography>=50,<51',
    'flwr>=1.41,<1.42',
    'httpx>=0.28,<1',
    'starlette>=1,<2',
  ],
  'notebook': [
    'ipykernel>=6.29,<8',
    'jupytext>=1.17,<2',
    'nbclient>=0.10,<0.12',
  ],
  'docs': [
    'myst-parser>=5,<6',
    'sphinx>=9,<10',
    'sphinx-book-theme>=1.4,<2',
  ],
  'wandb': ['wandb>=0.22,<0.32'],
  'timm': ['timm>=1.0.20,<2'],
  'torch': ['torch>=2.8,<3'],
  'dev': [
    'basedpyright>=1.32,<2',
    'hypothesis>=6.140,<7',
    'pytest>=8.4,<10',
    'pytest-xdist>=3.8,<4',
    'ruff>=0.14,<0.18',
  ],
}

setuptools.setup(
  name='efficient_llm',
  version=_VERSION.group(1),
  description='Train language models cheaper, in JAX.',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=setuptools.find_packages(
    include=['efficient_llm', 'efficient_llm.*']
  ),
  package_data={'efficient_llm.diloco.wan.app': ['pyproject.toml']},
  install_requires=_CORE,
  extras_require=_EXTRAS,
  classifiers=[
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
