"""Runs to share with others: exported models, and the Hugging Face Hub.

- ``export``: model of a checkpoint as a folder with card, config and weights
- ``shareable``: files of a run that may leave the machine
- ``hub``: push of these files to the Hub, and pull of a stranger's
"""
