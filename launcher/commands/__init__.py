"""The words and checks of `tritrain` commands that are more than a call."""
