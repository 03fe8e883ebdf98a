"Every public name at once, for notebooks: `from ftkit.all import *`. It does import torch."
from ftkit import *
