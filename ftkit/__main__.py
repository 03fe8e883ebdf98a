"`python -m ftkit` is the same as `ftkit`."
import sys
from ftkit.cli import main

if __name__ == "__main__": sys.exit(main())
