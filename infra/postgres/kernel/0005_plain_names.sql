-- Two names in the field's terms. Run by `claw up` before the services start, so no older process reads the old names.
ALTER TABLE consumer_offset RENAME COLUMN incarnation TO topic_id;
ALTER TABLE outbox_set_aside RENAME TO outbox_held_back;
