-- These reports are in the record: only now they go away, and with the last word of a job the job.
for i = 3, #ARGV do
    local entry = ARGV[i]
    local found = redis.call('XRANGE', REPORTS, entry, entry)[1]
    local said = {}
    for at = 1, found and #found[2] or 0, 2 do said[found[2][at]] = found[2][at + 1] end
    if said.l and said.j then
        local j = load(said.j)
        if j and j.s == 'e' and j.e == entry then redis.call('DEL', job_key(said.j)) end
    end
    redis.pcall('XACK', REPORTS, 'managers', entry)
    redis.call('XDEL', REPORTS, entry)
end
return 1
