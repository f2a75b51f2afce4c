-- Marks a job as in a hurry: the agent that has it, or will have it, is told with its next call. Returns 0 if it is unknown.
local id = ARGV[3]
local j = load(id)
if not j or j.s == 'e' then return 0 end
redis.call('HSET', job_key(id), 'h', '1')
return 1
