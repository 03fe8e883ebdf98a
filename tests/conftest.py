"What all tests share: no network, no windows, nothing kept in the user's home."
import atexit, os, shutil, tempfile

home = tempfile.mkdtemp(prefix="ftkit-tests-")
atexit.register(shutil.rmtree, home, ignore_errors=True)
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg",
                  FTKIT_CACHE=home)
