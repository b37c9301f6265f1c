"""What a call costs, against what it would cost otherwise: ``make bench``.

Each section measures some things in turn within one run, in a process of its own, and gives back
series of measurements and ratios of their medians. The machine may be shared and noisy: a figure
by itself says little, and no figure decides a test.
"""
