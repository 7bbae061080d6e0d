"""benchmarks/ is a folder of scripts that import each other, not a package."""

from support.launches import import_benchmarks

import_benchmarks()
