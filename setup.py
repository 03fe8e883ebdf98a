"Package metadata comes from settings.ini, so that the notebooks, the docs and the wheel agree."
import configparser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_name"]
extras = {"dev": "dev_requirements", "gpu": "gpu_requirements",
          "deepspeed": "deepspeed_requirements", "flash-attn": "flash_attn_requirements"}
readme = here/"README.md"

setup(
    name=lib, version=cfg["version"], description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0",
    url=cfg["git_url"], project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=[lib, f"{lib}.*"]),
    package_data={lib: ["assets/**"]},
    include_package_data=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[key].split() for name, key in extras.items()},
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{lib}={cfg['lib_path']}._modidx:d"]},
    classifiers=["Development Status :: 3 - Alpha", "Programming Language :: Python :: 3",
                 "Operating System :: OS Independent", "Intended Audience :: Developers",
                 "Intended Audience :: Education"],
    zip_safe=False,
)
