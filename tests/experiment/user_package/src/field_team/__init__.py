"""A team's own package, which knows robo_orchard_lab and which that doesn't know."""

import sys

print("field_team is imported", file=sys.stderr)
