"""Import this first to import other modules without garbage collections, which find nothing."""

import gc

gc.disable()
