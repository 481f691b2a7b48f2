-- The functions use the same plans for any number of rows. For one row PostgreSQL planned their statements at each call:
-- it guesses that an array has ten elements, and takes a plan for one to be cheaper. A call took a quarter longer.
ALTER FUNCTION append_events SET plan_cache_mode = force_generic_plan;
ALTER FUNCTION enqueue_items SET plan_cache_mode = force_generic_plan;
