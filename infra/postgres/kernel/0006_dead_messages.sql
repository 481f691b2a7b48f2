-- The resequencer asks which messages of a key are dead.
CREATE INDEX dead_letter_of_key ON dead_letter (key) WHERE source = 'rabbit' AND key IS NOT NULL;
