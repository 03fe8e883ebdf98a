"What all tests share: no network, no windows, nothing kept in the user's home."
import atexit, gc, glob, os, shutil, signal, tempfile

home = tempfile.mkdtemp(prefix="ftkit-tests-")
atexit.register(shutil.rmtree, home, ignore_errors=True)
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg",
                  FTKIT_CACHE=home)
# Triton reads this when it is imported, which any test module may do first
if not any(map(glob.glob, ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg"))):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A job in the background ignores it
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session):
    "What was imported stays; or each run of the trainer, which collects, would go through it all."
    gc.collect()
    gc.freeze()
