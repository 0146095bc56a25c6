"""The commands: arguments first, then the story in calls. The scripts at the top level run these."""
