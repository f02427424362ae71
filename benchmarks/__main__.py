"""python -m benchmarks inspect | convert"""

from benchmarks import main
from command import flags

if __name__ == "__main__":
    flags.run_script(main)
