-- When the service may handle a dead letter that is marked for redrive. Null: at once.
ALTER TABLE dead_letter ADD COLUMN redrive_after timestamptz;
