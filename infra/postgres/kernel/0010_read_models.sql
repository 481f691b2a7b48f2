-- The last verification of each read model, and the one that is under way or paused.
CREATE TABLE read_model (
    name text PRIMARY KEY,
    verified_at timestamptz,    -- the end of the last verification
    compared bigint,            -- its rows
    different bigint,           -- those of them that differ from their source, and were not repaired
    progress text               -- of the verification under way, JSON; null: none
);
