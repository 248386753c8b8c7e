"""What the bridge of sbi is made of: ``estimators`` has a flow as each kind of sbi's density estimators."""
