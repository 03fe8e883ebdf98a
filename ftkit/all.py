"Every public name at once, for notebooks: `from ftkit.all import *`. This is the line that does import torch."
from ftkit import *
