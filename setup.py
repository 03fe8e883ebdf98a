"Package metadata comes from settings.ini, so that the notebooks, the docs and the wheel agree."
import configparser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {"dev": "dev_requirements", "gpu": "gpu_requirements",
          "deepspeed": "deepspeed_requirements", "flash-attn": "flash_attn_requirements"}
setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8") if (here/"README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    license="Apache-2.0", keywords=cfg["keywords"].split(),
    packages=find_packages(include=["ftkit", "ftkit.*"]),
    package_data={"ftkit": ["assets/**/*", "assets/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[key].split() for name, key in extras.items()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    classifiers=["Programming Language :: Python :: 3", "Operating System :: OS Independent",
                 "Intended Audience :: Developers", "Intended Audience :: Education"],
    zip_safe=False,
)
