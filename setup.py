"""Packaging. `mgcc_dist/{kernels,launch,configs,slurm}` link to the top-level folders: the wheel carries them."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "mgcc_dist" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

READERS = [
    "defusedxml>=0.7",  # DDTI's outlines
    "openpyxl>=3.1",  # lists of images in Excel workbooks
]
AUGMENT = ["kornia>=0.9"]  # data.augment: ultrasound
ENCODERS = ["transformers>=4.56", "huggingface_hub>=0.34"]  # network.encoder
TRACKERS = ["mlflow-skinny>=3.1", "alembic>=1.13", "sqlalchemy>=2", "wandb>=0.19"]  # loop.tracker
SEARCH = ["optuna>=4.2"]  # `search:` in a sweep
CLINIC = ["pydicom>=3.0", "highdicom>=0.27", "nibabel>=5.3"]  # DICOM in, NIfTI and DICOM-SEG out
EXPORT = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"]  # mgcc export
SERVE = ["starlette>=0.46", "uvicorn>=0.34"]  # mgcc serve
OPENVINO = ["openvino>=2025.1"]  # mgcc export --to openvino

setup(
    name="mgcc-dist",
    version=VERSION,
    description="Semi-supervised ultrasound segmentation with latent diffusion (MGCC), a distributed training system",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["mgcc_dist", "mgcc_dist.*"]),
    # What is not Python, of the links too: configs/ and launch/ hold no package of their own.
    package_data={
        "mgcc_dist": [
            "py.typed",
            "assessment/curate.html",
            "serving/*.html",
            "serving/*.js",
            "reporting/*.html",
            "reporting/*.css",
            "kernels/**/*.json",
            "configs/**/*.yaml",
            "configs/**/*.json",
            "launch/**/*.yaml",
            "launch/**/*.json",
            "launch/**/*.md",
            "slurm/testbed/*",
            "slurm/**/*.yaml",
            "zoo/**/*",
        ],
    },
    install_requires=[
        "torch>=2.6",
        "accelerate>=1.10",
        "diffusers>=0.35",
        "webdataset>=1.0",
        "braceexpand>=0.1.7",  # webdataset brings it in any case
        "fsspec>=2025.3",  # as torch does
        "huggingface_hub>=0.34",  # as diffusers does; mgcc push and pull
        "jsonargparse>=4.40",
        "docstring-parser>=0.16",
        "safetensors>=0.5",
        "monai>=1.4",
        "scipy>=1.11",
        "contourpy>=1.2",
        "tabulate>=0.9",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "pillow>=11",
        "fvcore>=0.1.5.post20221221",
        "jinja2>=3.1",  # the report's page; torch brings it in any case
        "matplotlib>=3.9",
        "tabulate>=0.9",
        "numpy>=2.0",
        "PyYAML>=6.0",
    ],
    entry_points={"console_scripts": ["mgcc = mgcc_dist.cli:main"]},
    extras_require={
        "kernels": ["triton>=3.2"],
        "slurm": ["submitit>=1.5"],
        "deepspeed": ["deepspeed>=0.18", "transformers>=4.50"],  # accelerate reads transformers' version
        "readers": READERS,
        "encoders": ENCODERS,
        "search": SEARCH,
        "trackers": TRACKERS,
        "augment": AUGMENT,
        "s3": ["s3fs>=2025.3"],  # s3:// as data.shards
        "clinic": CLINIC,
        "export": EXPORT,
        "serve": SERVE,
        "openvino": [*EXPORT, *OPENVINO],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"],
        "dev": [
            *READERS,
            *AUGMENT,
            *ENCODERS,
            *SEARCH,
            *TRACKERS,
            *CLINIC,
            *EXPORT,
            *OPENVINO,
            *SERVE,
            "httpx2>=2",  # Starlette's TestClient
            "fire>=0.7",  # runs MONAI bundles from the command line
            "hypothesis>=6.100",
            "mypy>=1.15",
            "packaging>=24",
            "psutil>=6",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "pytorch-ignite>=0.5",  # runs MONAI bundles
            "ruff>=0.12",
            "selenium>=4.20",  # drives Chromium
            "setuptools>=77",
            "torchmetrics>=1.6",  # FID and KID to compare ours with
            "types-PyYAML",
            "types-defusedxml",
            "types-openpyxl",
            "types-tabulate",
            "types-tqdm",
        ],
    },
)
