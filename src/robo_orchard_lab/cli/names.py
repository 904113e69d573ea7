"""What the command line goes by."""

PROGRAM = "robo-orchard-lab"
DISTRIBUTION = "robo-orchard-hooks"
COMPLETE_VARIABLE = "_ROBO_ORCHARD_LAB_COMPLETE"
