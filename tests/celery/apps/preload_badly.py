"""Cannot be imported."""

raise LookupError("this module never works")
