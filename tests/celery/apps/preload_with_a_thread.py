"""Starts a thread that no child will have."""

import threading

threading.Thread(target=threading.Event().wait, name="thread-of-a-preload", daemon=True).start()
