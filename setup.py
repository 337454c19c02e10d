"""Package metadata; `launch/venv.sh` installs it with the pins of `constraints.txt`."""

import pathlib

import setuptools

setuptools.setup(
    name="mor",
    version="0.1.0",
    description="Mixture-of-Recursions language models in JAX",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*setuptools.find_packages(include=["mor", "mor.*"]), "mor.configs"],
    package_dir={"mor.configs": "configs"},
    package_data={"mor.data": ["corpora/*"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8.1",
        "etils>=1.9",
        "flax>=0.12.8",
        "gguf>=0.17",
        "grain>=0.2.12",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12,<0.13",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.5",
        "scipy>=1.11",
        "tensorboard>=2.18",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.20",
    ],
    entry_points={"console_scripts": ["mor=mor.__main__:run"]},
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "cuda12": ["jax[cuda12]"],
        # Compiles for GPUs without one: XLA:GPU and ptxas, 0.7 GB of the 4 GB of "cuda".
        "aot-gpu": ["jax[cuda13-local]", "nvidia-cuda-nvcc>=13.0.48,<14", "nvidia-nvvm>=13.0.48,<14"],
        "torch": ["torch>=2.4", "transformers>=5.0"],
        "peers": ["llama-cpp-python>=0.3.36", "peft>=0.17", "torch>=2.4", "transformers>=5.0"],
        "gcs": ["gcsfs>=2026.8"],  # for gs:// workdirs
        "hf": ["datasets>=4.0"],  # for data.source=hf:FOLDER
        "test": [
            "beartype>=0.20",
            "chex>=0.1.90",
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "torch>=2.4",
            "transformers>=5.0",
        ],
    },
)
