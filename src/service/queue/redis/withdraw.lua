-- Withdraws a job. Returns 0 if it is unknown, 1 if no agent holds it, 2 if the agent that holds it will be told, 3 if it is too late.
local id, doubt = ARGV[3], num(ARGV[4])
local j = load(id)
if not j then return 0 end
if j.s == 'e' then return 3 end
if j.s == 'h' then
    local till = num(redis.call('ZSCORE', held_key(j.n), id))
    -- Who died while the tag was being put on may have done it: then it goes on where it was, if it goes on soon.
    if j.k and till + lease * doubt > now then return 3 end
    if till > now then
        redis.call('HSET', job_key(id), 'c', '1')
        return 2
    end
end
forget(id, j)
wake_node(j.n)
wake_blocked_nodes()
return 1
