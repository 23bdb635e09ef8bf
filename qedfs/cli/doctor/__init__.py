"""What `qedfs doctor` looks at. A module for each kind of check; none of them knows the command."""
