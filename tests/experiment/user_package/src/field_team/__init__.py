"""A team's package that uses robo_orchard_lab."""

import sys

print("field_team is imported", file=sys.stderr)
