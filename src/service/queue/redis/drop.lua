-- Removes what was delivered and is no order of ours, so that it does not block the queue a second time.
local id, fence = ARGV[3], ARGV[4]
local j = load(id)
if not j or j.s ~= 'h' or j.f ~= fence then return 0 end
forget(id, j)
wake_node(j.n)
wake_blocked_nodes()
return 1
