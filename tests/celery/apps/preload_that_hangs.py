"""Its import never returns."""

import threading

threading.Event().wait()
