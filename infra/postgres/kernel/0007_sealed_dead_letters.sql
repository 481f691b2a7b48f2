-- Payloads of dead letters are sealed. Rows from before hold them as they came.
ALTER TABLE dead_letter ADD COLUMN sealed boolean NOT NULL DEFAULT false;
-- The person under whose key the payload is sealed. Null: no person is named, and it is sealed under the platform's key.
ALTER TABLE dead_letter ADD COLUMN subject_id text;
CREATE INDEX dead_letter_of_subject ON dead_letter (tenant_id, subject_id) WHERE subject_id IS NOT NULL;
CREATE INDEX dead_letter_age ON dead_letter (last_failed_at) WHERE state <> 'redriven';
