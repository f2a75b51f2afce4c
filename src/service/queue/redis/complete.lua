-- The last word goes out and the claim ends, both or neither. The job stays known until a manager has written that down,
-- lest another one offer it again in between.
local id, fence, sealed = ARGV[3], ARGV[4], ARGV[5]
local j = load(id)
if not j or j.f ~= fence then return 0 end
-- Update again, because the answer was lost.
if j.s == 'e' then return 1 end
if j.s ~= 'h' then return 0 end
local entry = redis.call('XADD', REPORTS, '*', 'm', sealed, 'j', id, 'l', '1', 'n', ARGV[6])
forget(id, j)
redis.call('HSET', job_key(id), 's', 'e', 'n', j.n, 'f', fence, 'e', entry, 't', j.t)
-- Should the report be lost, the job is not lost with it.
redis.call('EXPIRE', job_key(id), 3600)
wake_node(j.n)
wake_blocked_nodes()
return 1
