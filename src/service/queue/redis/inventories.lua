-- What lies under the sessions of each of the nodes: IDs and records by turns, so many at most, none that is longer.
local most, longest, all = num(ARGV[3]), num(ARGV[4]), {}
for at = 5, #ARGV do
    local sessions, found = P .. 'sessions:' .. ARGV[at], {}
    for n, id in ipairs(redis.call('HKEYS', sessions)) do
        if n > most then break end
        if id ~= '' and #id <= 256 and redis.call('HSTRLEN', sessions, id) <= longest then
            found[#found + 1] = id
            found[#found + 1] = redis.call('HGET', sessions, id)
        end
    end
    all[#all + 1] = found
end
return all
