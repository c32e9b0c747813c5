"""The benchmark's report as one page of HTML: from records to content, from content to tables, figures and the page.

``page.html_report`` and ``page.write_report`` are the way in; ``content`` holds what a caller hands over beside the records.
"""
