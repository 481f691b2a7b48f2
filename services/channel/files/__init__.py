"""Files of messages: fetched from the vendor, judged and stored; speech as text."""
