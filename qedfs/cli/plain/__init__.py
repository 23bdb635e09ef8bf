"""Commands that scripts run again and again, as functions that need no click: loading it takes longer than they do."""
